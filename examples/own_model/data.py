"""A data set as people write them: made up here, so that nothing has to be downloaded; yours opens files."""

import random

import torch
from torch.utils.data import Dataset


class Blobs(Dataset):
    """Pictures (3, 32, 32) from 0 to 1 of a bright spot in one of five places, and the number of the place."""

    places = ((8, 8), (8, 24), (24, 8), (24, 24), (16, 16))

    def __init__(self, count, seed, augment=False):
        self.count, self.seed, self.augment = count, seed, augment
        grid = torch.arange(32.0)
        self.y, self.x = grid[:, None], grid[None, :]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        label = int(torch.randint(5, (), generator=draw))
        row, column = self.places[label]
        if self.augment:  # drawn anew every time, as transforms are
            row, column = row + random.randint(-3, 3), column + random.randint(-3, 3)
        spot = torch.exp(-((self.y - row) ** 2 + (self.x - column) ** 2) / 18)
        noise = torch.rand(3, 32, 32, generator=draw)
        return (0.7 * spot + 0.3 * noise).clamp(0, 1), label


def splits(count=600):
    """(train, held out, test)"""
    return Blobs(count, 1, augment=True), Blobs(count // 4, 2), Blobs(count // 3, 3)
