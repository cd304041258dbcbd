"""What a grid of benchmarks/quality.py is made of: cells, each the command line with options, and options by name."""

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
        self.cells.update({label: self.cells.get(label, []) for label in self.controls})


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


def algorithms(*, lr: float, mu: float, local_steps: int, total: int) -> dict[str, list[str]]:
    """Return cells for algorithms under SGD, without which SCAFFOLD's controls mean nothing, and for K = 1.

    Args:
        lr: Learning rate of SGD, for both networks.
        mu: Weight of FedProx's proximal term.
        local_steps: K.
        total: Generator steps.
    """
    sgd = [option.format(lr=lr) for option in STATELESS["SGD"]]
    ways = {
        "FedGAN": [],
        f"FedProx, mu = {mu}": ["--federation.algorithm", f"{{class_path: FedProx, init_args: {{mu: {mu}}}}}"],
        "SCAFFOLD": ["--federation.algorithm", "Scaffold"],
    }
    found = {f"{way}, K = {local_steps}": [*rounds(total, local_steps), *sgd, *own] for way, own in ways.items()}
    return {**found, "FedGAN, K = 1": [*rounds(total, 1), *sgd]}


def methods(total: int, *, local_steps: int, samples: int) -> dict[str, list[str]]:
    """Return a cell for every method, IID and as the configuration divides the data, at ``total`` generator steps.

    Args:
        total: Generator steps of every cell.
        local_steps: K of the methods that average parameters; those with feedback have one step a round.
        samples: Samples of a batch of feedback.
    """
    algorithm = "--federation.algorithm"
    many, single = rounds(total, local_steps), rounds(total, 1)
    feedback = [*single, "--federation.sync", "{generator: server, discriminator: local}"]
    swapped = [*single, "--federation.sync", "{generator: server, discriminator: exchange}"]
    size = [f"{algorithm}.num_samples", str(samples)]
    served = ["--federation.sync", "{generator: served}", algorithm, "ServedGenerator"]
    served += [f"{algorithm}.generator_steps", str(local_steps), f"{algorithm}.num_samples", str(samples)]
    sgd = [option.format(lr=0.03) for option in STATELESS["SGD"]]
    ways = {
        "FedGAN": many,
        "FedGAN + exchange": [*many, "--federation.sync", "{discriminator: exchange}"],
        "MD-GAN": [*swapped, algorithm, "MDGAN", *size],
        "UA-GAN": [*feedback, algorithm, "UAGAN", *size],
        "F2U": [*feedback, algorithm, "F2U", *size],
        "served G": [*many, *served],
        "FedProx": [*many, algorithm, "FedProx", f"{algorithm}.mu", "0.1"],
        "SCAFFOLD (SGD)": [*many, algorithm, "Scaffold", *sgd],
        "FedBuff": [*many, "--federation.rules.asynchronous.buffer_size", "5"],
    }
    return {f"{way}, {where}": [*own, *part] for where, part in SPLITS.items() for way, own in ways.items()}


#: The season of a profile as its class, in place of the variable.
SEASON = [
    *("--data.source.label", "season"),
    *("--model.generator.init_args.num_classes", "4", "--model.discriminator.init_args.num_classes", "4"),
]


def factors(total: int, *, local_steps: int) -> dict[str, list[str]]:
    """Return cells for what averaged moments are worth, one factor at a time, and for what might replace them."""
    convolutions = [
        "--model.generator={class_path: DCGANGenerator, init_args: {image_size: 8, channels: 1, latent_dim: 32, "
        "width: 32, num_classes: 10}}",
        "--model.discriminator={class_path: DCGANDiscriminator, init_args: {image_size: 8, channels: 1, width: 32, "
        "num_classes: 10, conditioning: projection}}",
    ]
    usual = rounds(total, local_steps)
    changed = {
        "as it is": usual,
        "K = 20": rounds(total, 20),
        "batches of 128": [*usual, "--data.batch_size", "128"],
        "no labels": [*usual, *UNCONDITIONAL],
        "convolutions": [*usual, *convolutions],
        "IID": [*usual, *IID],
    }
    cells = {
        f"{change}, {policy}": [*options, *OPTIMIZERS[policy]]
        for change, options in changed.items()
        for policy in ("average", "reset")
    }
    faster = ["--model.discriminator_optimizer.init_args.lr", "4e-3"]
    cells["D four times as fast, reset"] = [*usual, *OPTIMIZERS["reset"], *faster]
    gentle = [option.format(lr=0.03) for option in STATELESS["SGD"]]
    cells["SCAFFOLD (SGD)"] = [*usual, "--federation.algorithm", "Scaffold", *gentle]
    return cells
