"""Rows as the data sets that Keras takes."""

from typing import Any

import keras
import numpy as np

DATASETS = ("tf.data", "PyDataset", "DataLoader")


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays: Any, size: int) -> None:
        super().__init__()
        self.arrays, self.size = arrays, size

    def __len__(self) -> int:
        return -(-len(self.arrays[-1]) // self.size)

    def __getitem__(self, index: int) -> Any:
        rows = slice(index * self.size, (index + 1) * self.size)
        return tuple(array[rows] for array in self.arrays)


def dataset(kind: str, *arrays: Any, size: int = 16) -> Any:
    """Return rows in batches, in their order; the last batch is smaller."""
    if kind == "PyDataset":
        return Batches(*arrays, size=size)
    if kind == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(arrays).batch(size)
    import torch

    parts = torch.utils.data.TensorDataset(*(torch.from_numpy(np.array(a)) for a in arrays))
    return torch.utils.data.DataLoader(parts, batch_size=size)
