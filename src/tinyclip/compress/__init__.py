"""Cutting a student out of a teacher: by rule, by learned masks, by measured importance.

`inheritance` has the manual rule and `compact`, the one cut that all methods end in. `learned_masks` has the
hard-concrete masks and their constraint. `importance` and `calibrate` measure what matters. `budget` fills a target
size by the order of either; `latency` turns milliseconds into a sparsity target.

May import: inputs, model, loss and common. Knows no recipe and no run, so it works in any training loop. Start with
`inheritance`."""

from tinyclip.compress.calibrate import Calibration as Calibration
from tinyclip.compress.calibrate import calibrate as calibrate
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.inheritance import compact as compact
from tinyclip.compress.inheritance import inherit as inherit
from tinyclip.compress.learned_masks import Constraint as Constraint
from tinyclip.compress.learned_masks import HardConcrete as HardConcrete
