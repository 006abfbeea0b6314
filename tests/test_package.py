"""What should be cheap to import is, and every public name can be had."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cascade

#: The baseline of the reference model.
BASELINE = "baselines/smollm2-135m-instruct-q4_1/embedded.saturation.json"


@pytest.mark.parametrize("module", ["cascade", "cascade.cli", "cascade.plugin"])
def test_importing_the_surface_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reports_load_neither_a_model_library_nor_a_plotting_one() -> None:
    code = """
import importlib, pkgutil, sys
import cascade.report
for module in pkgutil.walk_packages(cascade.report.__path__, "cascade.report."):
    importlib.import_module(module.name)
print(sorted({"torch", "transformers", "datasets", "matplotlib"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["compare", BASELINE, BASELINE], ["check", "baselines"], ["history", "baselines"]]
)
def test_commands_that_read_records_alone_load_no_model_library(arguments: list[str]) -> None:
    code = f"""
import contextlib, io, sys
from cascade.cli import main
sys.argv[1:] = {arguments}
try:
    with contextlib.redirect_stdout(io.StringIO()):
        main()
except SystemExit as end:
    print(end.code or 0, sorted({{"torch", "transformers", "datasets"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_every_public_name_can_be_had() -> None:
    for name in cascade.__all__:
        assert getattr(cascade, name) is not None
    assert set(dir(cascade)) == set(cascade.__all__)
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        cascade.__getattr__("analyse")
