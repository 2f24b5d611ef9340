#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), numpy 2.4.6
# Behaviour: torch's FlopCounterMode gives one and the same matrix product four different counts, by the form in which it
#   is written: dense 200,000; the same matrix as sparse CSR also 200,000 although 1 % of it is stored (2,000 are needed);
#   as sparse COO 0; added in place with addmm_ 0, where addmm counts. A complex product, four real ones, counts as one.
# Seen: a "sparse" network counts as dense or as free, by its layout; whoever divides time by it is off either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(call):
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


matrix, x = torch.eye(100), torch.randn(100, 10)
coo, csr = matrix.to_sparse(), matrix.to_sparse_csr()
a, b, c = torch.randn(8, 16), torch.randn(16, 8), torch.zeros(8, 8)
complex_a, complex_b = a.to(torch.complex64), b.to(torch.complex64)
seen = {
    "dense @ x": flops(lambda: matrix @ x),
    "CSR @ x": flops(lambda: csr @ x),
    "COO @ x": flops(lambda: torch.sparse.mm(coo, x)),
    "addmm": flops(lambda: torch.addmm(c, a, b)),
    "addmm_": flops(lambda: c.clone().addmm_(a, b)),
    "real product": flops(lambda: a @ b),
    "complex product": flops(lambda: complex_a @ complex_b),
}
for name, count in seen.items():
    print(f"{name:16} {count:>8}")
expected = {"dense @ x": 200_000, "CSR @ x": 200_000, "COO @ x": 0, "addmm": 2048, "addmm_": 0, "real product": 2048, "complex product": 2048}
assert torch.__version__.startswith("2.13.0"), torch.__version__
assert torch.allclose(matrix @ x, csr @ x) and torch.allclose(matrix @ x, torch.sparse.mm(coo, x))
assert seen == expected, {k: (seen[k], expected[k]) for k in seen if seen[k] != expected[k]}
PY
echo "as described"
