"""The art: a student out of a teacher. Inheritance by rule (`inheritance`), by learned masks (`learned_masks`), by
measured importance (`importance`, `calibrate`, `latency`), and the one cut that all of them end in, `compact`.

Imports common, model and loss. It knows no recipe and no run, so it works inside any training loop. Begin with
`inheritance`."""

from tinyclip.compress.calibrate import Calibration as Calibration
from tinyclip.compress.calibrate import calibrate as calibrate
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.inheritance import compact as compact
from tinyclip.compress.inheritance import inherit as inherit
from tinyclip.compress.learned_masks import Constraint as Constraint
from tinyclip.compress.learned_masks import HardConcrete as HardConcrete
