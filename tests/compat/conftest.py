"""Tests of other libraries with the stand-in run in a process of their own, where it is installed first.

A module marked `pytestmark = pytest.mark.stand_in` is collected here and run by one child process, in which
`halfbyte.install()` came before anything else; the child's reports are replayed as if the tests had run here. So the
tests read like anybody's tests with `import bitsandbytes`, transformers is imported once a module, and a
crash costs one module.

HALFBYTE_STAND_IN=halfbyte      run everything in this process, with the stand-in (what the child does)
HALFBYTE_STAND_IN=bitsandbytes  the same tests with the real package (to see what it does)
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLE = "HALFBYTE_STAND_IN"
REPORTS = "HALFBYTE_STAND_IN_REPORTS"
INSIDE = os.environ.get(VARIABLE)
CHILD_TIMEOUT = 1500  # seconds; each test has its own limit in the child

if INSIDE == "halfbyte":
    import halfbyte

    halfbyte.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stand_in: runs in a child process with halfbyte.install()")


@pytest.fixture(scope="module")
def text(tiny_llama):
    """A prompt, as token ids of the bundled model."""
    import tiny_models

    tokenizer = tiny_models.tokenizer(tiny_llama)
    # transformers 4 gives its generic tokenizers token types, which no Llama takes
    return tokenizer("The tests of this library are run by", return_tensors="pt", return_token_type_ids=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family of tiny_models."""
    import tiny_models

    root = tmp_path_factory.mktemp("families")
    return {family: tiny_models.save(root / family, family) for family in tiny_models.FAMILIES}


@pytest.fixture(scope="module", autouse=True)
def _the_right_package(request: pytest.FixtureRequest) -> None:
    """Whatever the environment says, a stand_in test must not test the wrong package."""
    if INSIDE and request.node.get_closest_marker("stand_in"):
        import bitsandbytes

        assert ("halfbyte" in bitsandbytes.__file__) == (INSIDE == "halfbyte"), bitsandbytes.__file__


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(REPORTS)
    if INSIDE and path:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"nodeid": report.nodeid, "report": data}) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    global _config
    _config = session.config


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE or item.get_closest_marker("stand_in") is None:
        return None
    stash = item.session.stash
    if _RESULTS not in stash:
        stash[_RESULTS] = {}
    results = stash[_RESULTS]
    module = item.nodeid.split("::")[0]
    if module not in results:
        siblings = [i for i in item.session.items if i.nodeid.split("::")[0] == module]
        results[module] = dict(_run_child(siblings))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = results[module].get(item.nodeid, [])
    if not any(report.when == "teardown" for report in reports):  # it began at most
        reports = [*reports, _missing(item, results[module][""])]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the last test of this process left standing for this one: not set up here, not torn down here.
    item.session._setupstate.teardown_exact(nextitem)
    return True


_RESULTS = pytest.StashKey[dict]()
_config: pytest.Config


def _run_child(items: list[pytest.Item]) -> Iterator[tuple[str, object]]:
    """(nodeid, reports) of each test, and ("", what the child said)."""
    config = items[0].config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports"
        path.touch()
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
        command += ["--rootdir", str(config.rootpath), "--confcutdir", str(config.rootpath)]
        command += ["-c", str(config.inipath), *(item.nodeid for item in items)]
        try:
            child = subprocess.run(
                command,
                cwd=config.rootpath,
                env={**os.environ, VARIABLE: "halfbyte", REPORTS: str(path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=CHILD_TIMEOUT,
            )
            said = f"exit status {child.returncode}\n{child.stdout[-4000:]}"
        except subprocess.TimeoutExpired as error:
            said = f"stopped after {CHILD_TIMEOUT} s\n{(error.stdout or b'')[-4000:]!r}"
        found: dict[str, list] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=entry["report"])
            if report.skipped and isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # which JSON knows not
            found.setdefault(entry["nodeid"], []).append(report)
    yield from found.items()
    yield "", said


def _missing(item: pytest.Item, said: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the child process that ran this module did not finish this test: {said}",
        when="call",
    )
