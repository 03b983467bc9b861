"""Judging a model: zero-shot accuracy and retrieval recall (`metrics`), a linear probe (`probe`), several models side
by side (`compare`, with `stats` for intervals and tests).

Imports data, zoo, loss and what is below them. Begin with `metrics`; what is listed here is `tinyclip.evaluate`."""

from tinyclip.data.datasets import Dataset as Dataset
from tinyclip.data.datasets import Example as Example
from tinyclip.data.datasets import open_dataset as open_dataset
from tinyclip.evaluate.metrics import class_features as class_features
from tinyclip.evaluate.metrics import encode_images as encode_images
from tinyclip.evaluate.metrics import evaluate as evaluate
from tinyclip.evaluate.metrics import retrieval as retrieval
from tinyclip.evaluate.metrics import text_features as text_features
from tinyclip.evaluate.metrics import zero_shot as zero_shot
