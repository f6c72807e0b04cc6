"""The GPU kernels of the hash encoding: what they compute, in Triton's interpreter, and that they compile.

Each in a process of its own, for the interpreter is chosen when triton is imported.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

AGREES = """
import torch
from distill3d.scenes.hashgrid.encoding import reference
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.scenes.hashgrid.encoding_triton import encode_triton
layout = HashLayout(levels=4, features=2, log2_table=8, coarsest=3, finest=20)
g = torch.Generator().manual_seed(0)
table = torch.randn(layout.rows, 2, generator=g).requires_grad_()
points = 1.2 * torch.rand(150, 3, generator=g) - 0.1
for slopes in (False, True):
    for levels in (4, 2):
        fast, slow = (f(table, points, layout, levels, slopes) for f in (encode_triton, reference))
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
        out = torch.randn(fast.shape, generator=g)
        a, b = (torch.autograd.grad(f, table, out)[0] for f in (fast, slow))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
print("done")
"""

COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill3d.scenes.hashgrid import encoding_triton
signature = dict.fromkeys(("table", "points", "values"), "*fp32") | dict.fromkeys(("cells", "starts"), "*i32")
signature |= dict.fromkeys(("count", "channels"), "i32")
fixed = {"features": 2, "size": 2**19, "kinds": 4}
for kernel in (encoding_triton._forward, encoding_triton._backward):
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
print("done")
"""


@pytest.mark.parametrize(("code", "interpret"), [(AGREES, "1"), (COMPILES, "0")], ids=["agrees", "compiles"])
def test_kernels(code, interpret, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "done", run.stderr
