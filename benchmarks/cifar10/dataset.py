"""CIFAR-10 from parquet files with JPEG or PNG bytes, decoded once into tensors."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


@lru_cache(maxsize=2)
def load_cifar10(folder: Path, split: str, device: torch.device | str = "cpu") -> TensorDataset:
    """Read `folder/{split}.parquet` (columns `image.bytes`, `label`) as normalised `(N, 3, 32, 32)` float32 images.

    They are decoded once a process.
    """
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SystemExit(f"--data: {path} not found; expected CIFAR-10 as train.parquet and test.parquet in {folder}")
    table = pq.read_table(path)
    column = next(name for name in ("image", "img") if name in table.schema.names)
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[column].to_pylist()]
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
    return TensorDataset(images.to(device), torch.tensor(table["label"].to_pylist(), device=device))


def subset(dataset: TensorDataset, keep: Tensor) -> TensorDataset:
    """The rows of `dataset` named by `keep`, a boolean mask or an index tensor."""
    return TensorDataset(*(tensor[keep] for tensor in dataset.tensors))


def batches(
    dataset: TensorDataset, batch_size: int = 1000, generator: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of `dataset`, in its order or in one that `generator` draws; on a GPU where it lies there."""
    return DataLoader(
        _Rows(dataset), batch_size, shuffle=generator is not None, generator=generator, collate_fn=_as_it_is
    )


class _Rows(Dataset[tuple[Tensor, ...]]):
    """Looks a batch up at once: item by item, images on a GPU would take two launches each."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.tensors = dataset.tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(rows, device=self.tensors[0].device)
        return tuple(tensor[index] for tensor in self.tensors)


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch
