"""Folders of pictures for a federation of real processes: each site has digits of its own, and a file of settings.

    python -m benchmarks.site_folders sites --root data         # MNIST is downloaded to data, unless it is there
    python -m fedgan_lightning deploy trial --sites 3 --site sites/site0.yaml sites/site1.yaml sites/site2.yaml \
        --home federation --config configs/mnist.yaml --run_dir runs/between

Site k of n holds the k-th part of the ten digits, as PNGs, one subfolder per digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from fedgan_lightning.data.sources import TorchvisionImages


def write(out: Path, *, root: str, sites: int, per_class: int) -> list[int]:
    """Write all folders and settings; return the number of pictures of every site."""
    source = TorchvisionImages("MNIST", root=root)
    source.prepare()
    train = source.load("train")
    names, labels = [str(digit) for digit in range(10)], train.y.numpy()
    counts = []
    for number, digits in enumerate(np.array_split(np.arange(10), sites)):
        folder, total = (out / f"site{number}").resolve(), 0
        for digit in digits.tolist():
            (folder / str(digit)).mkdir(parents=True, exist_ok=True)
            for place in np.flatnonzero(labels == digit)[:per_class].tolist():
                Image.fromarray(train.x[place, 0].numpy()).save(folder / str(digit) / f"{place:05d}.png")
                total += 1
        own = {"root": str(folder), "image_size": 28, "channels": 1, "classes": True, "class_names": names}
        settings = {"data": {"source": {"class_path": "ImageFolder", "init_args": own}}}
        (out / f"site{number}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        counts.append(total)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", default="data", help="where MNIST is, or is downloaded to")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--per_class", type=int, default=800, help="pictures of every digit")
    arguments = parser.parse_args()
    counts = write(arguments.out, root=arguments.root, sites=arguments.sites, per_class=arguments.per_class)
    print("; ".join(f"site {number}: {count} pictures" for number, count in enumerate(counts)))


if __name__ == "__main__":
    main()
