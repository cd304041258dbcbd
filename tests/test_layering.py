"""Lower layers never import higher or equal ones; optional and heavy packages stay inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedgan_lightning"

#: Longest prefix wins. Equal layers never import each other.
LAYERS = {
    "version": 0,
    "errors": -2,
    "options": 0,
    "files": 1,
    "documents": 1,
    "provenance": 1,
    "claim": 2,
    "jsonl": 2,
    "seeding": -1,
    "protocol": 0,
    "states": 1,
    "packing": 2,
    "data.order": 0,
    "data.samples": 1,
    "data.sources.base": 2,
    "data.partition": 2,
    "data.items": 2,
    "data.held_out": 2,
    "data.given_partitions": 3,
    "data.streams": 3,
    "data.clients": 4,
    "data.in_memory": 4,
    "data.dividing": 5,
    "data.own": 5,
    "data.controls": 2,
    "data.vocabulary": 1,
    "data.reading": -1,
    "data.rows": 0,
    "data.tables": 2,
    "data.dates": 1,
    "data.levels": 0,
    "data.pictures": 1,
    "data.dicom_header": 1,
    "data.dicom": 2,
    "data.nifti": 2,
    "data.formats": 3,
    "data.folders": 2,
    "data.arrays": 2,
    "data.sources.bundled": 3,
    "data.sources.images": 4,
    "data.sources.medical": 3,
    "data.sources.files": 3,
    "data.sources.toys": 3,
    "data.sources.series": 3,
    "data.sources.interactions": 3,
    "data.sources.text": 3,
    "data.sources": 5,
    "data.datamodule": 6,
    "gan.conditions": 0,
    "gan.cfgan_condition": 1,
    "gan.objectives": 1,
    "gan.penalties": 1,
    "gan.priors": 1,
    "gan.networks.mlp": 1,
    "gan.networks.scalar": 1,
    "gan.networks.spectral": 1,
    "gan.networks.profile": 1,
    "gan.networks.interactions": 1,
    "gan.networks.text": 2,
    "gan.networks.dcgan": 2,
    "gan.networks.inpainting": 2,
    "gan.networks.acgan": 2,
    "gan.networks.resnet": 3,
    "gan.networks.r3gan": 3,
    "gan.networks": 5,
    "gan.inpainting_mask": 1,
    "gan.editing": 2,
    "gan.draws": 1,
    "gan.layout": 0,
    "gan.steps": 2,
    "gan.statistics": 0,
    "gan.optimizers": 0,
    "gan.augment": 1,
    "gan.sampling": 2,
    "gan.precision": 0,
    "gan.average": 1,
    "gan.checks": 1,
    "gan.tracing": 1,
    "gan.batches": 1,
    "gan.first_batch": 2,
    "gan.trainer_steps": 3,
    "gan.construction": 2,
    "gan.exporting": 0,
    "gan.restoring": 4,
    "gan.module": 5,
    "gan.stacked": 6,
    "gan.text": 5,
    "federation.sampling": 3,
    "federation.client_log": 2,
    "federation.client_data": 0,
    "federation.attributes": 0,
    "federation.plain_state": 1,
    "federation.kept_attributes": 2,
    "federation.client_callbacks": 2,
    "federation.client_progress": 6,
    "federation.sample_source": 2,
    "federation.preparation": 3,
    "federation.starting_point": 3,
    "federation.constants": 3,
    "federation.client_settings": 7,
    "federation.ranks": 1,
    "federation.rank_watch": 2,
    "federation.drift": 15,
    "federation.server_average": 15,
    "federation.aggregation": 3,
    "federation.store": 3,
    "federation.optimizer_state": 2,
    "federation.policy": 2,
    "federation.costs": 3,
    "federation.fast_trainer": 0,
    "federation.round_trainer": 4,
    "federation.namespaces": 1,
    "federation.algorithm": 3,
    "federation.transform_chain": 4,
    "federation.round_schedules": 4,
    "federation.stop_signals": 0,
    "federation.client_context": 5,
    "federation.known_data": 0,
    "federation.generator_step": 6,
    "federation.generator_options": 1,
    "federation.client_update": 5.5,
    "federation.label_balance": 4,
    "federation.durations": 2.2,
    "federation.asynchronous": 2.5,
    "federation.arrivals": 2.6,
    "federation.virtual_clock": 2.7,
    "federation.real_arrivals": 2.8,
    "federation.exchange": 4,
    "federation.feedback.samples": 2,
    "federation.feedback.algorithm": 7,
    "federation.feedback.ensemble": 8,
    "federation.feedback": 9,
    "update_transform": 1,
    "federation.step_hooks": 6,
    "federation.local": 7,
    "federation.discrepancy": 0,
    "federation.algorithms.iflgan": 6,
    "federation.algorithms.fedgan": 6,
    "federation.algorithms.fedprox": 6,
    "federation.algorithms.scaffold": 6,
    "federation.algorithms.served_generator": 7,
    "gan.abilities": 3,
    "federation.algorithms.mdgan": 9,
    "federation.algorithms.uagan": 9,
    "federation.algorithms.forgiving": 9,
    "federation.algorithms.mean_discriminator": 9,
    "federation.algorithms": 10,
    "federation.transforms.clipping": 3,
    "federation.transforms.codec": 2,
    "federation.transforms.dense": 3,
    "federation.transforms.sparse": 3,
    "federation.transforms.power": 3,
    "federation.transforms.moments": 4,
    "federation.transforms.signs": 4,
    "federation.transforms": 6,
    "federation.vectorized_trainer": 8,
    "federation.report": 5,
    "federation.entry_sums": 4,
    "hooks": 1,
    "federation.executors.sequential": 8,
    "federation.run_fingerprint": 1,
    "federation.schema": 3,
    "federation.update_schema": 8,
    "federation.update_checks": 9,
    "federation.receiver": 10,
    "federation.rules": 3,
    "federation.secure": 4,
    "federation.robust": 5,
    "federation.selection": 5,
    "federation.round": 11,
    "federation.memory": 0,
    "federation.threads": 2,
    "federation.parity_check": 9,
    "federation.workload": 10,
    "federation.executors.vectorized": 10,
    "federation.executors.autotuner": 10,
    "federation.executors.auto": 11,
    "federation.executors.autotune": 12,
    "federation.executors.faulty": 12,
    "federation.executors": 13,
    "federation.server": 5,
    "federation.checks": 6,
    "federation.warm_start": 7,
    "federation.orchestrator": 14,
    "evaluation.features": 2,
    "evaluation.federated_classifier": 9,
    "evaluation.fid": 3,
    "evaluation.modes": 1,
    "evaluation.kernel": 1,
    "evaluation.neighbours": 0,
    "evaluation.metrics": 8,
    "evaluation.fidelity": 9,
    "evaluation.downstream_tasks": 10,
    "dp": 0,
    "dp.accounting": 1,
    "dp.randomness": 0,
    "dp.statement": 2,
    "dp.charges": 2,
    "data.poisson": 2,
    "gan.example_privacy": 3,
    "gan.private_steps": 4,
    "federation.client_privacy": 4,
    "federation.transforms.private": 5,
    "federation.example_charges": 4,
    "federation.distributed_noise": 5,
    "federation.privacy_keeper": 6,
    "federation.privacy_checks": 8,
    "federation.continuation": 6,
    "federation.personal": 6,
    "model_card": 3,
    "privacy": 8,
    "privacy_command": 18,
    "dp.audits.statistics": 1,
    "dp.audits.scores": 1,
    "dp.audits.views": 1,
    "dp.audits.inversion": 2,
    "dp.audits": 3,
    "evaluation.audit": 9,
    "evaluation.attacks": 10,
    "evaluation.per_class": 9,
    "evaluation.series": 9,
    "evaluation.ranking": 9,
    "evaluation.text": 9,
    "evaluation.class_gap": 15,
    "evaluation.modalities": 11,
    "evaluation.watchers": 1,
    "evaluation.callback": 12,
    "evaluation.inpainting_baselines": 2,
    "evaluation.completion": 10,
    "visuals.labels": 0,
    "visuals.pictures": 2,
    "visuals.progress": 2,
    "visuals.participation": 3,
    "visuals.runs": 5,
    "visuals.charts": 6,
    "visuals.participation_charts": 7,
    "visuals.audit_panel": 7,
    "visuals.report": 8,
    "visuals.tensorboard": 13,
    "visuals.samples": 15,
    "visuals.recommendations": 14,
    "visuals.completion": 14,
    "visuals.inspection": 14,
    "evaluation.portable": 5,
    "evaluation.federated_queries": 7,
    "deployment.wire": 3,
    "deployment.handed_on": 8.5,
    "deployment.coded_tasks": 6,
    "deployment.masking": 0,
    "deployment.signatures": 5,
    "deployment.session": 6,
    "deployment.replies": 5,
    "deployment.opened": 6,
    "deployment.opened_sums": 5,
    "deployment.expelled": 0,
    "deployment.answers": 4,
    "deployment.sites": 6,
    "deployment.flower": 9,
    "deployment.secure": 7,
    "deployment.secure_users": 10,
    "deployment.data": 8,
    "deployment.status": 8,
    "deployment.shared_settings": 16,
    "deployment.audit_log": 0,
    "deployment.site_data": 9,
    "deployment.site_memory": 4,
    "deployment.site_policy": 4,
    "deployment.site_budget": 9,
    "deployment.site_queries": 17,
    "deployment.site": 18,
    "deployment.apps": 19,
    "deployment.keys": 2,
    "deployment.supernode_supervisor": 1,
    "deployment.clientapp_shim": 0,
    "deployment.clientapp": 20,
    "deployment.forkserver": 21,
    "deployment.programs": 22,
    "deployment.proxy": 23,
    "deployment.kits": 24,
    "deployment.options_of": 25,
    "deployment.server_check": 23,
    "deployment.membership": 23,
    "deployment.check": 23,
    "deployment.launch": 26,
    "deployment.app.app": 20,
    "checkpoints": 3,
    "run_directory": 5,
    "parser": 14,
    "recorder": 15,
    "aggregators": 16,
    "asynchronous": 16,
    "algorithms": 16,
    "callbacks": 16,
    "editing": 16,
    "executors": 16,
    "losses": 16,
    "metrics": 16,
    "networks": 16,
    "partitions": 16,
    "samplers": 16,
    "schedules": 16,
    "sources": 16,
    "transforms": 16,
    "assembly": 16,
    "auditing": 16,
    "api": 17,
    "cli": 17,
}
#: Packages that bare modules (documentation only) and entry points may import freely.
EXEMPT = {"", "__main__", "data", "gan", "federation", "evaluation", "visuals", "deployment"}
LAZY = {"cryptography", "sklearn", "matplotlib", "PIL", "torchvision", "flwr", "opacus", "dp_accounting", "scipy"}
LAZY |= {"cv2", "pydicom", "nibabel", "datasets"}
#: The pure core: no Lightning.
NO_LIGHTNING = ("errors", "seeding", "protocol", "states", "gan.objectives", "gan.penalties", "gan.priors", "gan.steps")
NO_LIGHTNING += ("gan.networks", "data.samples", "data.partition", "data.sources", "evaluation.fid", "evaluation.modes")
NO_LIGHTNING += ("federation.aggregation", "federation.sampling", "federation.store", "federation.costs")
NO_LIGHTNING += (
    "federation.rules",
    "federation.robust",
    "federation.policy",
    "federation.optimizer_state",
    "visuals.pictures",
    "data.vocabulary",
    "data.reading",
    "data.tables",
    "data.dates",
    "data.pictures",
    "data.folders",
    "data.arrays",
    "data.order",
    "data.rows",
    "data.items",
    "data.given_partitions",
)


def layer_of(module: str) -> float | None:
    return LAYERS.get(module)


def imports(tree: ast.AST, *, top_level_only: bool = False) -> list[str]:
    """Return what a module imports; a type that is only named (``if TYPE_CHECKING``) is no import."""
    found = []
    nodes = ast.walk(tree) if not top_level_only else _outside_functions(tree)
    named = {inner for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in nodes:
        if node in named:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += ["." if node.level else f"{node.module}:{alias.name}" for alias in node.names]
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _outside_functions(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _outside_functions(child)


def violations(module: str, source: str) -> list[str]:
    """Return what is wrong with one module."""
    tree, found = ast.parse(source), []
    mine = layer_of(module)
    if mine is None:
        return [f"{module} has no layer"]
    for name in imports(tree):
        if name == ".":
            found.append(f"{module}: relative import")
        if not name.startswith("fedgan_lightning"):
            continue
        target, _, item = name.partition(":")
        target = target.removeprefix("fedgan_lightning").removeprefix(".")
        candidates = [f"{target}.{item}".strip("."), target]
        other = next((candidate for candidate in candidates if candidate in LAYERS), None)
        if other is None:
            if target not in EXEMPT:
                found.append(f"{module}: imports {target}, which has no layer")
        elif LAYERS[other] >= mine:
            found.append(f"{module} (layer {mine}) imports {other} (layer {LAYERS[other]})")
    for name in imports(tree, top_level_only=True):
        package = name.partition(":")[0].split(".")[0]
        if package in LAZY:
            found.append(f"{module}: {package} at module level")
        if package == "lightning" and module.startswith(NO_LIGHTNING):
            found.append(f"{module}: Lightning in the pure core")
    return found


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name not in EXEMPT:
            found[name] = path
    return found


def test_every_module_imports_only_lower_layers():
    assert [line for name, path in modules().items() for line in violations(name, path.read_text())] == []


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("states", "from fedgan_lightning.gan.module import GAN", "states (layer 1) imports gan.module"),
        ("gan.steps", "def f():\n    from fedgan_lightning.cli import run", "imports cli"),
        ("states", "from . import protocol", "relative import"),
        ("recorder", "import matplotlib", "matplotlib at module level"),
        ("recorder", "try:\n    import flwr\nexcept ImportError:\n    pass", "flwr at module level"),
        ("gan.objectives", "import lightning as L", "Lightning in the pure core"),
        ("gan.unknown", "", "has no layer"),
    ],
)
def test_planted_faults_are_found(module, source, expected):
    assert any(expected in line for line in violations(module, source))


def test_files_stay_readable():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 420} == {}
