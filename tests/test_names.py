"""The package speaks the field's words: private ones that once stood for them are gone, in names and on file names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedgan_lightning

PACKAGE = Path(fedgan_lightning.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
#: A word that was private, and the field's.
WORDS = {
    "Attendance": "Participation",
    "attendance": "participation",
    "CohortData": "StackedBatches",
    "CohortStream": "StackedBatchStream",
    "CohortTrainer": "VectorizedLocalTrainer",
    "Conductor": "RoundRunner",
    "Contact": "ClientReport",
    "ClientRecord": "ClientReport",
    "Holes": "InpaintingMask",
    "Incident": "ClientReport",
    "Invitation": "ClientSelection",
    "LocalWork": "ClientTask",
    "Participant": "ClientReport",
    "Plan": "ExecutionMode",
    "Purchases": "CFGANCondition",
    "Question": "FederatedQuery",
    "Respondent": "QueryContext",
    "QUESTIONS": "QUERIES",
    "RollCall": "RoundReport",
    "RoundSummary": "RoundReport",
    "Screening": "UpdateValidator",
    "SecureSurvey": "SecureQueries",
    "SurveyedData": "RemoteData",
    "SurveyedDataModule": "RemoteDataModule",
    "TemperatureSchedule": "schedules",
    "Trials": "Autotuner",
    "Way": "ExecutionMode",
    "conduct": "run",
    "invite": "select",
    "network_in_ledger": "cost_group",
    "respondent": "context",
}
FILES = {
    "allocation", "agreement", "attendance", "breakdown", "cohort", "conduct", "door", "fills", "gap", "invitation",
    "journal", "ledger", "operations", "questions", "reference", "supervise", "utility", "warm",
}  # fmt: skip
#: In ``gan/``, where other people's networks meet the package.
GAN_WORDS = {"averaged", "drawn", "follow", "lift", "own", "settled", "terms", "told"}


def names(path: Path) -> set[str]:
    """Return every name that a module defines, takes or uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.arg(arg=name) | ast.Name(id=name):
                found.add(name)
            case ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
    return {name.strip("_") for name in found}


def test_private_words_are_gone_from_names():
    found = {(path.relative_to(PACKAGE), word) for path in MODULES for word in names(path) & WORDS.keys()}
    assert not found, [f"{path}: {word}, the field says {WORDS[word]}" for path, word in sorted(found)]


def test_private_words_are_gone_from_files():
    assert not {path for path in MODULES if path.stem in FILES}


@pytest.mark.parametrize("path", [path for path in MODULES if "gan" in path.relative_to(PACKAGE).parts[:1]], ids=str)
def test_networks_and_losses_have_no_dialect(path):
    assert not names(path) & GAN_WORDS
