#!/usr/bin/env bash
# Versions: scipy 1.17.1 (its HiGHS), numpy 2.4.6
# Behaviour: scipy.optimize.milp with display off (the default) writes lines of its own to the process's standard
#   output in some searches (their words: transformNewIntegerFeasibleSolution; the same program with presolve off is
#   silent). Most programs are solved without a word. The lines come from C++: contextlib.redirect_stdout does not see
#   them.
# Seen: one of 40 random knapsacks with one option per layer, as rank selection makes them, prints; whoever pipes a
#   command's JSON gets a line that is none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
cd "$folder"
cat > knapsack.py <<'PY'
import contextlib
import io
import sys

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

LAYERS, OPTIONS = 39, 27


def least_damage(seed):
    """One option a layer, at half of the whole cost, with the least damage."""
    random = np.random.default_rng(seed)
    cost, damage = [], []
    for _ in range(LAYERS):
        layer = random.choice([1.0, 1.0, 1.0, 4.0]) / (LAYERS * 1.5) * 2
        left = np.concatenate([[1.0], np.sort(random.uniform(0.02, 0.98, OPTIONS - 1))[::-1]])
        cost += list(layer * left)
        damage += [0.0, *np.sort(10.0 ** random.uniform(-7, -1, OPTIONS - 1))]
    cost = np.array(cost)
    number = len(cost)
    one = csr_matrix((np.ones(number), (np.repeat(np.arange(LAYERS), OPTIONS), np.arange(number))))
    half = 0.5 * cost.reshape(LAYERS, OPTIONS)[:, 0].sum()
    return milp(
        np.array(damage) + 1e-6 * cost,
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(cost[None], -np.inf, np.array([half]))],
        integrality=np.ones(number),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "disp": False},
    )


seen = io.StringIO()
with contextlib.redirect_stdout(seen):
    status = least_damage(int(sys.argv[1])).status
assert status == 0, status
assert seen.getvalue() == "", "Python sees the line now"
PY
said=0
for seed in $(seq 0 39); do
  lines=$("$folder/venv/bin/python" knapsack.py "$seed")
  if [ -n "$lines" ]; then
    said=$((said + 1))
    printf 'program %s prints: %s\n' "$seed" "$(head -n 1 <<<"$lines")"
  fi
done
[ "$said" -ge 1 ] || { echo "no program prints any more"; exit 1; }
echo "$said of 40 programs print with display off"
