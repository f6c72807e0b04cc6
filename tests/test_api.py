"""The public names of the package."""

import inspect
import subprocess
import sys

import distill3d as d3d


def test_every_public_name_exists_and_is_documented():
    assert 25 <= len(d3d.__all__) <= 40 and sorted(set(d3d.__all__)) == sorted(d3d.__all__)
    for name in d3d.__all__:
        value = getattr(d3d, name)
        assert not inspect.ismodule(value), name
        assert not callable(value) or inspect.getdoc(value), name


def test_functions_are_not_hidden_by_packages_of_the_same_name():
    """`distill` is a package too: whatever is imported first or later, the name is the function."""
    code = (
        "import distill3d.distill.regularizers, distill3d as d3d, distill3d.distill.image_recipes;"
        "from distill3d.distill import recipes;"
        "assert callable(d3d.distill) and callable(d3d.generate) and d3d.scenes.VoxelField is d3d.VoxelField"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_neither_an_import_nor_the_help_loads_torch():
    """torch takes seconds; what a command needs is imported when it runs."""
    code = (
        "import sys, distill3d, distill3d.cli.main as cli;"
        "assert cli.run(['--help']) == 0 and cli.run(['--version']) == 0;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_names_that_are_loaded_on_demand_are_the_public_ones():
    assert {*d3d._HOME, "__version__"} == set(d3d.__all__) <= set(dir(d3d))
    assert not hasattr(d3d, "nonsense")
