"""What benchmarks/quality.py compares: every grid with its cells."""

from __future__ import annotations

from benchmarks.cells import (
    AGGREGATORS,
    ATTACK,
    CENTRALISED,
    EQUAL,
    FAULTS,
    IID,
    IMAGE_COLUMNS,
    MNIST,
    ON_MEAN_GRADIENT,
    OPTIMIZERS,
    QUICK,
    RING_COLUMNS,
    SEASON,
    SIGNS,
    SIMULTANEOUS,
    SPLITS,
    STAY,
    STRONG,
    UNCONDITIONAL,
    UNION,
    Grid,
    algorithms,
    factors,
    falling,
    k_sweep,
    losses,
    methods,
    only,
    optimizers,
    rounds,
    split,
)

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
            "K = 20, reset, a bit a number": [
                *(*rounds(1200, 20), *OPTIMIZERS["reset"], "--federation.transforms", "[SignCompression]"),
            ],
            "centralised": [*rounds(1200, 100), *CENTRALISED],
        },
        columns=IMAGE_COLUMNS,
    ),
    "private_mnist": Grid(
        title="MNIST, five sites, epsilon 10 for one record at delta 1e-5: 500 generator steps",
        config="private_mnist.yaml",
        common=["--data.source.init_args.root", "{shared}"],
        cells={
            "five sites": [],
            "one site alone": only(0),
            "centralised": CENTRALISED,
            "five sites, no privacy": ["--model.privacy", "null"],
        },
        columns=("fid", "fid_test", "classes", "class_accuracy", "tstr_accuracy", "trtr_accuracy"),
        seeds=(0,),
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
        common=["--data.source.path", "{shared}/energy/ETTh1.csv", "--federation.executor", "VectorizedExecutor"],
        cells={
            "federated, K = 20": rounds(2000, 20),
            "UA-GAN": methods(2000, local_steps=1, samples=64)["UA-GAN, divided"],
            "the season as class, K = 20": [*rounds(2000, 20), *SEASON],
            "centralised, the season as class": SEASON,
        },
        controls={
            "centralised": ("centralised", 2000),
            "centralised, the season as class": ("centralised", 2000),
            "local only (client 0)": ("local:0", 2000),
        },
        columns=("centroid_distance", "discriminative_score", "predictive_error", "predictive_error_of_reals"),
    ),
    "digits_algorithms": Grid(
        title="digits, ten clients with two kinds each: algorithms under SGD at 2 000 generator steps",
        config="digits.yaml",
        common=["--federation.executor", "VectorizedExecutor", *QUICK],
        cells=algorithms(lr=0.03, mu=0.1, local_steps=20, total=2000),
        columns=IMAGE_COLUMNS[:6],
    ),
    "methods": Grid(
        title="digits, ten clients, IID and two kinds each: methods at 1 000 generator steps",
        config="digits.yaml",
        common=["--federation.executor", "VectorizedExecutor"],
        cells=methods(1000, local_steps=5, samples=32),
        columns=("fid", "fid_test", "tstr_accuracy", "classes", "class_distance"),
    ),
    "mnist_methods": Grid(
        title="MNIST, five clients, IID and two digits each, width 16: four methods at 400 generator steps",
        config="mnist.yaml",
        common=MNIST,
        cells={
            label: [*own, "--evaluation.every_n_rounds", "1000"]  # at the end alone
            for label, own in methods(400, local_steps=20, samples=64).items()
            if label.startswith(("FedGAN", "MD-GAN", "UA-GAN"))
        },
        columns=("fid", "fid_test", "tstr_accuracy", "classes", "class_distance"),
    ),
    "mnist_compression": Grid(
        title="MNIST, five clients with two digits each, K = 20, 400 generator steps, fresh moments, width 16: codes",
        config="mnist.yaml",
        common=[*MNIST, *QUICK, *rounds(400, 20), *OPTIMIZERS["reset"]],
        cells={
            "float32": [],
            **{f"{code}": ["--federation.transforms", f"[{code}]"] for code in ("Int8", "SignCompression")},
            "top 1 %": ["--federation.transforms", "[{class_path: TopK, init_args: {share: 0.01}}]"],
        },
        columns=("fid", "fid_test", "classes", "recall"),
    ),
    "digits_factors": Grid(
        title="digits, ten clients with two kinds each: averaged and fresh moments, one factor at a time",
        config="digits.yaml",
        common=["--federation.executor", "VectorizedExecutor", *QUICK],
        cells=factors(1000, local_steps=5),
        columns=("fid", "fid_test", "classes", "recall"),
        seeds=(0,),
    ),
    "ring8_algorithms": Grid(
        title="ring of 8, four clients with two modes each: algorithms under SGD at 6 000 steps, falling rates",
        config="ring8.yaml",
        common=["--federation.executor", "VectorizedExecutor", *falling(6000)],
        cells=algorithms(lr=0.1, mu=0.1, local_steps=20, total=6000),
        columns=RING_COLUMNS,
    ),
}
