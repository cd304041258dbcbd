"""What benchmarks/quality.py compares: every grid with its cells, each the command line with some options."""

from __future__ import annotations

from dataclasses import dataclass, field

CENTRALISED = ["--data.num_clients", "1", "--data.partition", "IID"]


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        title: In words.
        config: Configuration that all cells start from.
        cells: Options by label.
        seeds: Seeds of every cell.
        columns: Metrics of the table, as in test.json.
        common: Options of all cells.
        controls: Kind and generator steps (see benchmarks/controls.py) of the cells that are no federation, by label.
        baselines: Ends of the names under which metrics report what needs no training, a row each.
    """

    title: str
    config: str
    cells: dict[str, list[str]]
    columns: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: list[str] = field(default_factory=list)
    controls: dict[str, tuple[str, int]] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.cells.update({label: [] for label in self.controls})


def rounds(total: int, local_steps: int) -> list[str]:
    """Return options for ``total`` generator steps in rounds of ``local_steps``, looked at five times on the way."""
    count = total // local_steps
    seldom = str(max(1, count // 5))
    return [
        *("--federation.rounds", str(count), "--federation.local_steps", str(local_steps)),
        *("--evaluation.every_n_rounds", seldom, "--pictures.every_n_rounds", seldom),
        *("--checkpoint.every_n_rounds", seldom),
    ]


def only(client: int) -> list[str]:
    """Return options for training on one client's data alone."""
    return ["--federation.clients", "SelectedClients", "--federation.clients.clients", f"[{client}]"]


IMAGE_COLUMNS = (
    "fid",
    "fid_raw",
    "fid_test",
    "kid_test",
    "classes",
    "recall",
    "tstr_accuracy",
    "nearest_distance_ratio",
)
#: Curves of TensorBoard, at their start and their end.
SIGNS = ("train/loss_g", "drift/generator", "drift/discriminator", "gap/held_minus_absent")
RING_COLUMNS = ("modes", "modes_raw", "high_quality", "high_quality_raw", "mode_divergence")
RING_COLUMNS += ("mode_spread", "mode_spread_raw")


def split(clients: int) -> list[str]:
    """Return options for ten classes divided among so many clients."""
    each = str(10 // clients)
    return ["--data.num_clients", str(clients), "--data.partition.init_args.num_classes", each]


IID = ["--data.partition", "IID"]
MNIST = ["--data.source.init_args.root", "{shared}", "--federation.executor", "SequentialExecutor"]
#: What most tables show, and no more: without classifiers trained on samples and neighbours in the clients' data.
QUICK = ["--evaluation.metrics", "[FrechetDistance, KernelDistance, ClassCoverage, PrecisionRecall]"]
#: Networks that take no label, in place of conditional ones.
UNCONDITIONAL = [
    *("--model.generator.init_args.num_classes", "0"),
    *("--model.discriminator.init_args.num_classes", "0", "--model.discriminator.init_args.conditioning", "none"),
]
LOSSES = ("NonSaturating", "Hinge", "LeastSquares", "RelativisticPairing")
#: What becomes of moments, and optimizers without any on clients.
OPTIMIZERS = {policy: ["--federation.optimizer_state", policy] for policy in ("average", "keep", "reset")}
STATELESS = {
    "SGD": [
        *("--model.generator_optimizer", "{{class_path: torch.optim.SGD, init_args: {{lr: {lr}}}}}"),
        *("--model.discriminator_optimizer", "{{class_path: torch.optim.SGD, init_args: {{lr: {lr}}}}}"),
    ],
    "Adam at the server": ["--server.optimizer", "{{class_path: torch.optim.Adam, init_args: {{lr: {server}}}}}"],
}


def optimizers(*, lr: float, server: float, gentle: float | None = None) -> dict[str, list[str]]:
    """Return cells for what becomes of optimizer state, IID and as the configuration divides the data.

    Args:
        lr: Learning rate of SGD.
        server: Learning rate of Adam at the server, which steps on the mean of updates made with reset moments.
        gentle: A lower learning rate of SGD beside it, where some seeds diverge.
    """
    stateless = {name: [o.format(lr=lr, server=server) for o in options] for name, options in STATELESS.items()}
    stateless["Adam at the server"] += OPTIMIZERS["reset"]
    if gentle is not None:
        stateless[f"SGD at {gentle}"] = [o.format(lr=gentle) for o in STATELESS["SGD"]]
    ways = {**OPTIMIZERS, **stateless}
    return {f"{way}, {where}": [*own, *part] for where, part in SPLITS.items() for way, own in ways.items()}


STAY = ["--federation.sync", "{discriminator: local}"]
#: What two of ten clients do, at so many times the length of an honest update.
ATTACK = ["--federation.executor", "FaultyExecutor", "--federation.executor.always", "{3: sign_flip, 7: noise}"]
STRONG = [*ATTACK, "--federation.executor.attack_scale", "10"]
AGGREGATORS = {
    "mean": [],
    "coordinate median": ["--federation.aggregator", "CoordinateMedian"],
    "trimmed mean": ["--federation.aggregator", "TrimmedMean", "--federation.aggregator.share", "0.2"],
    "Krum": ["--federation.aggregator", "Krum", "--federation.aggregator.num_bad", "2"],
    "multi-Krum": [
        *("--federation.aggregator", "Krum", "--federation.aggregator.num_bad", "2"),
        *("--federation.aggregator.num_selected", "6"),
    ],
    "geometric median": ["--federation.aggregator", "GeometricMedian"],
    "Krum of mixed updates": [
        *("--federation.aggregator", "NearestNeighborMixing", "--federation.aggregator.num_bad", "2"),
        *("--federation.aggregator.aggregator", "Krum", "--federation.aggregator.aggregator.num_bad", "2"),
    ],
}
KINDS = ("crash", "hang", "slow", "nan", "wrong_shape", "wrong_keys", "stale", "huge_norm")
FAULTS = [
    *("--federation.executor", "FaultyExecutor"),
    *(option for kind in KINDS for option in (f"--federation.executor.{kind}", "0.0625")),
    *(
        "--federation.rules",
        "RoundRules",
        "--federation.rules.min_report_fraction",
        "0.2",
        "--federation.validator",
        "UpdateValidator",
    ),
    *("--federation.validator.max_norm", "100"),
]
SPLITS: dict[str, list[str]] = {"divided": [], "IID": IID}


def falling(total: int) -> list[str]:
    """Return options for learning rates that fall to 5 % within so many steps."""
    scheduler = "{class_path: torch.optim.lr_scheduler.LinearLR, init_args: {start_factor: 1.0, end_factor: 0.05"
    scheduler += f", total_iters: {total}}}}}"
    return ["--model.generator_scheduler", scheduler, "--model.discriminator_scheduler", scheduler]


#: The discriminator's learning rate, the generator's in place of twice it.
EQUAL = ["--model.discriminator_optimizer.init_args.lr", "1e-3"]
#: As many samples a step as the four clients together.
UNION = ["--data.batch_size", "512"]
SIMULTANEOUS = ["--model.updates", "simultaneous"]
#: With K = 1, SGD of rate 1 and both gradients at one point a client's update is its gradient: the server does what a
#: centralised run does.
ON_MEAN_GRADIENT = [
    *SIMULTANEOUS,
    *("--model.generator_optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 1.0}}"),
    *("--model.discriminator_optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 1.0}}"),
    *("--model.generator_scheduler", "null", "--model.discriminator_scheduler", "null"),
    *("--server.optimizer", "{class_path: torch.optim.Adam, init_args: {lr: 1e-3, betas: [0.5, 0.999]}}"),
    *(
        "--server.scheduler",
        "{class_path: torch.optim.lr_scheduler.LinearLR,"
        " init_args: {start_factor: 1.0, end_factor: 0.05, total_iters: 6000}}",
    ),
]


def losses() -> dict[str, list[str]]:
    """Return cells for adversarial losses, IID and as the configuration divides the data."""
    return {f"{x}, {where}": ["--model.loss", x, *part] for x in LOSSES for where, part in SPLITS.items()}


def k_sweep(total: int, steps: tuple[int, ...]) -> dict[str, list[str]]:
    """Return cells for several K, and the controls."""
    cells = {f"K = {k}": rounds(total, k) for k in steps}
    cells["centralised"] = [*rounds(total, 100), *CENTRALISED]
    cells["local only (client 0)"] = [*rounds(total, 100), *only(0)]
    return cells


GRIDS = {
    "digits_k": Grid(
        title="digits, five clients with two kinds each: local steps K at 1 000 generator steps",
        config="digits.yaml",
        common=["--data.num_clients", "5"],
        cells=k_sweep(1000, (1, 5, 20, 100, 500)),
        columns=IMAGE_COLUMNS,
    ),
    "digits_optimizer": Grid(
        title="digits, ten clients: optimizer state, with two kinds of digit each and IID",
        config="digits.yaml",
        common=rounds(1000, 10),
        cells=optimizers(lr=0.1, server=1e-3, gentle=0.03),
        columns=IMAGE_COLUMNS,
    ),
    "mnist_k": Grid(
        title="MNIST, five clients with two digits each: local steps K at 1 000 generator steps, width 16",
        config="mnist.yaml",
        common=MNIST,
        cells=k_sweep(1000, (1, 5, 20, 100, 500)),
        columns=IMAGE_COLUMNS,
    ),
    "mnist": Grid(
        title="MNIST, five clients with two digits each, and centralised: 1 200 generator steps, width 16",
        config="mnist.yaml",
        common=MNIST,
        cells={
            "K = 20": rounds(1200, 20),
            **{f"K = 20, {policy}": [*rounds(1200, 20), *OPTIMIZERS[policy]] for policy in ("keep", "reset")},
            "centralised": [*rounds(1200, 100), *CENTRALISED],
        },
        columns=IMAGE_COLUMNS,
    ),
    "mnist_clients": Grid(
        title="MNIST, B clients with 10 / B digits each: K = 20, 1 000 generator steps, width 16",
        config="mnist.yaml",
        common=[*MNIST, *rounds(1000, 20)],
        cells={f"B = {clients}": split(clients) for clients in (2, 5, 10)},
        columns=IMAGE_COLUMNS,
    ),
    "digits_signs": Grid(
        title="digits, five clients, K = 20, 1 000 generator steps: signs of divergence, and remedies",
        config="digits.yaml",
        common=["--data.num_clients", "5", *rounds(1000, 20), "--trainer.callbacks", "HeldAbsentGap"],
        cells={
            "IID": IID,
            "two kinds each": [],
            "IID, discriminators stay": [*STAY, *IID],
            "two kinds each, discriminators stay": STAY,
            "two kinds each, K = 5": rounds(1000, 5),
            "two kinds each, all labels": ["--model.fake_labels", "all"],
            "two kinds each, kept moments": ["--federation.optimizer_state", "keep"],
        },
        columns=(*IMAGE_COLUMNS[:6], *(f"{sign}, {end}" for sign in SIGNS for end in ("first", "last"))),
    ),
    "mnist_optimizer": Grid(
        title="MNIST, five clients, 600 generator steps, K = 20, width 16: optimizer state, two digits each and IID",
        config="mnist.yaml",
        common=[*MNIST, *rounds(600, 20)],
        cells=optimizers(lr=0.02, server=1e-2, gentle=0.005),
        columns=IMAGE_COLUMNS[:7],
    ),
    "mnist_optimizer_unconditional": Grid(
        title="MNIST without labels, else as mnist_optimizer: optimizer state, two digits each and IID",
        config="mnist.yaml",
        common=[*MNIST, *UNCONDITIONAL, *QUICK, *rounds(600, 20)],
        cells=optimizers(lr=0.02, server=1e-2),
        columns=IMAGE_COLUMNS[:6],
    ),
    "mnist_buffers": Grid(
        title="MNIST, five clients with two digits each, 600 generator steps, K = 20, width 16: BatchNorm's statistics",
        config="mnist.yaml",
        common=[*MNIST, *QUICK, *rounds(600, 20)],
        cells={
            f"{buffers}, {where}": ["--federation.buffers", buffers, *part]
            for where, part in SPLITS.items()
            for buffers in ("merge", "local", "estimate")
        },
        columns=IMAGE_COLUMNS[:6],
    ),
    "digits_attacks": Grid(
        title="digits, ten clients, IID: one that turns its updates round, one that sends noise",
        config="digits.yaml",
        common=[*rounds(1000, 10), *IID],
        cells={
            "mean, all honest": [],
            "Krum, all honest": AGGREGATORS["Krum"],
            "mean, attacked at equal length": ATTACK,
            **{f"{name}, attacked": [*STRONG, *options] for name, options in AGGREGATORS.items()},
        },
        columns=IMAGE_COLUMNS[:6],
    ),
    "mnist_attacks": Grid(
        title="MNIST, ten clients, IID, 600 generator steps, K = 20, width 16: the same two attackers",
        config="mnist.yaml",
        common=[*MNIST, *QUICK, *rounds(600, 20), *IID, "--data.num_clients", "10"],
        cells={"mean, all honest": [], **{f"{name}, attacked": [*STRONG, *own] for name, own in AGGREGATORS.items()}},
        columns=IMAGE_COLUMNS[:6],
    ),
    "digits_faults": Grid(
        title="digits, ten clients with two kinds of digit each, 100 rounds: half of the cohort fails each round",
        config="digits.yaml",
        common=rounds(1000, 10),
        cells={
            "no faults": [],
            "no faults, half as many rounds": ["--federation.rounds", "50"],
            "mixed faults, validated": FAULTS,
        },
        columns=IMAGE_COLUMNS[:6],
    ),
    "ring8_loss": Grid(
        title="ring of 8, four clients with two modes each, and IID: losses at 15 000 steps, falling rates",
        config="ring8.yaml",
        common=["--federation.executor", "VectorizedExecutor", *falling(15000)],
        cells=losses(),
        columns=RING_COLUMNS,
        seeds=(0, 1, 2, 3, 4),
    ),
    "ring8_k": Grid(
        title="ring of 8, four clients with two modes each: synchronised every step, every five, and centralised",
        config="ring8.yaml",
        common=["--federation.executor", "VectorizedExecutor", *falling(6000)],
        cells={
            **{
                f"K = {k}{where}": [*rounds(6000, k), *rate]
                for where, rate in (("", []), (", equal rates", EQUAL))
                for k in (1, 5)
            },
            "K = 1, equal rates, Adam at the server on the mean gradient": [*rounds(6000, 1), *ON_MEAN_GRADIENT],
            "K = 1, equal rates, simultaneous": [*rounds(6000, 1), *EQUAL, *SIMULTANEOUS],
            **{
                f"centralised, equal rates{how}": [*rounds(6000, 100), *CENTRALISED, *EQUAL, *own]
                for how, own in (
                    ("", []),
                    (", minibatches of 512", UNION),
                    (", minibatches of 512, simultaneous", [*UNION, *SIMULTANEOUS]),
                )
            },
        },
        columns=RING_COLUMNS,
    ),
    "ring8_optimizer": Grid(
        title="ring of 8, four clients with two modes each, and IID: optimizer state at 15 000 steps, falling rates",
        config="ring8.yaml",
        common=["--federation.executor", "VectorizedExecutor", *falling(15000)],
        cells=optimizers(lr=0.1, server=1e-3),
        columns=RING_COLUMNS,
    ),
    "ring8_average": Grid(
        title="ring of 8, four clients with two modes each, 15 000 steps: the moving average, and learning rates",
        config="ring8.yaml",
        common=[
            *("--federation.executor", "VectorizedExecutor"),
            *("--evaluation.metrics", "[ModeCoverage, FrechetDistance]"),  # in the features of a classifier of modes
        ],
        cells={"rates stay": [], "rates fall": falling(15000)},
        columns=("fid", "fid_raw", "fid_test", "fid_test_raw", *RING_COLUMNS),
        seeds=(0, 1, 2, 3, 4),
    ),
    "grid25_optimizer": Grid(
        title="25-grid, five clients with five modes each, and IID: optimizer state at 10 000 of its 30 000 steps",
        config="grid25.yaml",
        common=["--federation.executor", "VectorizedExecutor", *rounds(10000, 5), *falling(10000)],
        cells=optimizers(lr=0.1, server=1e-3),
        columns=RING_COLUMNS,
    ),
    "grid25_loss": Grid(
        title="25-grid, five clients with five modes each, and IID: losses at 30 000 steps",
        config="grid25.yaml",
        common=["--federation.executor", "VectorizedExecutor"],
        cells=losses(),
        columns=RING_COLUMNS,
        seeds=(0, 1, 2, 3, 4),
    ),
    "medical": Grid(
        title="PneumoniaMNIST, five hospitals unequal in size, in pneumonia and in contrast: 1 200 generator steps",
        config="medical.yaml",
        common=["--data.source.root", "{shared}/medmnist", "--federation.executor", "SequentialExecutor"],
        cells={"federated, K = 20": rounds(1200, 20)},
        controls={"centralised": ("centralised", 1200), "local only (hospital 4)": ("local:4", 1200)},
        columns=(
            *("fid", "fid_test", "tstr_auc", "trtr_auc", "tstr_accuracy", "trtr_accuracy"),
            *("auc_own_data/4", "auc_with_synthetic/4", "nearest_distance_ratio"),
            *(f"membership_auc/{k}" for k in range(5)),
            *(f"membership_auc_discriminator/{k}" for k in range(5)),
        ),
    ),
    "inpainting": Grid(
        title="MNIST with holes, five clients with two digits each: 1 000 generator steps",
        config="inpainting.yaml",
        common=["--data.source.root", "{shared}", "--federation.executor", "SequentialExecutor"],
        cells={"federated, K = 20": []},
        controls={
            "centralised": ("centralised", 1000),
            **{f"local only (client {client})": (f"local:{client}", 1000) for client in range(5)},
        },
        columns=("completion_psnr", "completion_ssim", "completion_l1", "completion_fid"),
        baselines=("mean_fill", "nearest_fill", "telea_fill"),
    ),
    "timeseries": Grid(
        title="ETTh1, one client per variable: 2 000 generator steps",
        config="timeseries.yaml",
        common=["--data.source.path", "{shared}/energy/ETTh1.csv"],
        cells={"federated, K = 20": rounds(2000, 20)},
        controls={"centralised": ("centralised", 2000), "local only (client 0)": ("local:0", 2000)},
        columns=("centroid_distance", "discriminative_score", "predictive_error", "predictive_error_of_reals"),
    ),
}
