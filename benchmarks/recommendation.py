"""CFGAN federated, centralised and alone, beside popularity, item neighbours and matrix factorisation.

    pip install implicit
    python -m benchmarks.recommendation --ratings ml-latest-small/ratings.csv --catalogue ml-latest-small/movies.csv

Everything is measured by ``RankingQuality`` on the held-out fifth of every user's films; the seed draws the hold-out,
the weights and the minibatches. The GANs are those of configs/recommendation.yaml and take the same number of generator
steps: ``federated`` on every client, ``centralised`` as one client that holds all users, ``local`` on every client
without a server, each scored on its own users. Options after ``--`` go to the command line of the GANs.

The baselines see all users' data. Neighbours (cosine) and alternating least squares (Hu, Koren and Volinsky 2008) are
those of ``implicit``. What is done is kept in ``--folder`` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bare import bare_trainer
from benchmarks.cells import CENTRALISED
from fedgan_lightning.cli import FederatedCLI, built
from fedgan_lightning.evaluation.ranking import histories, preferences, ranking_values
from fedgan_lightning.files import write_json
from fedgan_lightning.provenance import described

CONFIG = Path(__file__).parents[1] / "configs" / "recommendation.yaml"
COLUMNS = ("ndcg20", "precision5", "precision20", "recall20", "mrr")


def popularity(seen: Tensor) -> Tensor:
    """Score items by their number of users."""
    return seen.sum(0).expand_as(seen)


def neighbours(seen: Tensor) -> Tensor:
    """Score items by the cosine similarity of the 50 nearest to each of the user's."""
    from implicit.nearest_neighbours import CosineRecommender
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(seen.numpy())
    model = CosineRecommender(K=50)
    model.fit(matrix, show_progress=False)
    return torch.from_numpy((matrix @ model.similarity).toarray())


def factorisation(seen: Tensor) -> Tensor:
    """Score items by weighted matrix factorisation with 32 factors."""
    from implicit.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    model = AlternatingLeastSquares(factors=32, regularization=0.1, alpha=2.0, iterations=20, random_state=0)
    model.fit(csr_matrix(seen.numpy()), show_progress=False)
    return torch.from_numpy(model.user_factors @ model.item_factors.T)


def build(options: argparse.Namespace, seed: int, extra: list[str]) -> FederatedCLI:
    """Return the configuration's model, data and federation."""
    arguments = ["--config", str(CONFIG), "--data.source.path", options.ratings, "--data.source.seed", str(seed)]
    arguments += ["--data.source.catalogue", options.catalogue, "--seed_everything", str(seed)]
    return built([*arguments, *options.extra, *extra])


def federation(options: argparse.Namespace, seed: int, extra: list[str]) -> dict[str, float]:
    """Train as the configuration says, and rank for all users."""
    cli = build(options, seed, extra)
    server, data = cli.model, cli.datamodule
    bare_trainer(cli.orchestrator).fit(server, datamodule=data)
    seen, wanted = histories(data)
    return ranking_values(preferences(server.model, seen), seen=seen, wanted=wanted)


def alone(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train every client by itself, and rank for its own users; means over users."""
    cli = build(options, seed, [])
    data, orchestrator = cli.datamodule, cli.orchestrator
    steps = orchestrator.rounds * (orchestrator.local_steps or 1)
    seen, wanted = histories(data)
    own = {user: row for row, user in enumerate(data.train_samples.columns["user"].tolist())}
    assert len(own) == len(seen), "every user has some of both"
    scores = torch.empty_like(seen)
    for client_id in range(data.num_clients):
        gan = build(options, seed, []).model.model
        torch.manual_seed(seed)
        trainer = bare_trainer()
        trainer.fit_loop.max_epochs = 1
        trainer.fit(gan, datamodule=data.client(client_id, num_steps=steps))
        rows = torch.from_numpy(data.indices[client_id])
        scores[rows] = preferences(gan, seen[rows])
    return ranking_values(scores, seen=seen, wanted=wanted)


def baseline(score: Callable[[Tensor], Tensor]) -> Callable[[argparse.Namespace, int], dict[str, float]]:
    """Return what measures a baseline."""

    def measure(options: argparse.Namespace, seed: int) -> dict[str, float]:
        seen, wanted = histories(build(options, seed, []).datamodule)
        return ranking_values(score(seen), seen=seen, wanted=wanted)

    return measure


ROWS: dict[str, Callable[[argparse.Namespace, int], dict[str, float]]] = {
    "popularity": baseline(popularity),
    "neighbours": baseline(neighbours),
    "factorisation": baseline(factorisation),
    "local": alone,
    "federated": lambda options, seed: federation(options, seed, []),
    "federated, IID": lambda options, seed: federation(options, seed, ["--data.partition", "IID"]),
    "centralised": lambda options, seed: federation(options, seed, CENTRALISED),
    "centralised, twice the steps": lambda options, seed: federation(
        options, seed, [*CENTRALISED, "--federation.rounds", str(2 * build(options, seed, []).orchestrator.rounds)]
    ),
}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return mean and standard deviation over seeds as markdown, with NDCG relative to popularity."""
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " | NDCG of popularity's | s |", "|---" * (len(COLUMNS) + 4) + "|"]
    popular = {values["seed"]: values["ndcg20"] for values in found.get("popularity", [])}
    for name, done in found.items():
        cells = []
        for column in COLUMNS:
            values = [each[column] for each in done]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")
        ratios = [each["ndcg20"] / popular[each["seed"]] for each in done if each["seed"] in popular]
        ratio = f"{statistics.mean(ratios):.2f}" if ratios else "-"
        seconds = statistics.mean(each["seconds"] for each in done)
        lines.append(f"| {name} | {len(done)} | {' | '.join(cells)} | {ratio} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", required=True)
    parser.add_argument("--catalogue", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path("runs/recommendation_benchmark"))
    parser.add_argument("extra", nargs="*", help="options of the GANs' command line, after --")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for name in options.rows:
            path = options.folder / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}.json"
            if not path.exists():
                started = time.perf_counter()
                values = ROWS[name](options, seed)
                write_json(path, {**values, "seed": seed, "seconds": time.perf_counter() - started})
            found.setdefault(name, []).append(json.loads(path.read_text()))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    print(f"{described()}\n")
    print(table({name: found[name] for name in options.rows}))


if __name__ == "__main__":
    main()
