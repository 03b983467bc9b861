"""Evaluation: zero-shot, retrieval, linear probe, comparison of models.

`metrics` computes accuracy and recall, `probe` fits the linear probe, `compare` and `contenders` run several models
side by side, `stats` has intervals and tests. These re-exports are the public API of `tinyclip.evaluate`.

May import: inference, data and below. Start with `metrics`."""

from tinyclip.data.datasets import Dataset as Dataset
from tinyclip.data.datasets import Example as Example
from tinyclip.data.datasets import open_dataset as open_dataset
from tinyclip.evaluate.metrics import class_features as class_features
from tinyclip.evaluate.metrics import encode_images as encode_images
from tinyclip.evaluate.metrics import evaluate as evaluate
from tinyclip.evaluate.metrics import retrieval as retrieval
from tinyclip.evaluate.metrics import text_features as text_features
from tinyclip.evaluate.metrics import zero_shot as zero_shot
