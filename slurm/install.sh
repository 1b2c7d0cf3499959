#!/usr/bin/env bash
# cldf_dist and all it needs in a virtual environment, by pip; the one recipe of `make install`,
# of clusters (no root needed) and of the container images.
#   slurm/install.sh [FOLDER]    the environment; .venv of the repository without it
# PYTHON=python3.11    the interpreter to make it with; 3.11 or newer
# TORCH_INDEX=https://download.pytorch.org/whl/cpu    torch from there: a build without CUDA
# EXTRAS=dev           what the tests and linters need, too
# EDITABLE=no          a copy of the package; otherwise the repository's own files are imported
# pip's own variables hold (PIP_FIND_LINKS, PIP_NO_INDEX, PIP_CACHE_DIR, ...). Run it again after an
# interruption, or to bring the environment up to date.
set -euo pipefail

say() { echo "install.sh: $*" >&2; }

(($# <= 1)) && [[ ${1:-} != -* ]] || { say "usage: slurm/install.sh [FOLDER]"; exit 2; }
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-$PWD/.venv}
if [[ $folder != /* ]]; then folder=$start/$folder; fi
folder=$(realpath -m "$folder") # venv refuses a link
mine=$folder/.cldf-install-unfinished # there until the first installation is complete
python=${PYTHON:-python3}
if [[ $python == */* && $python != /* ]]; then python=$start/$python; fi

command -v "$python" >/dev/null || { say "there is no $python; set PYTHON=python3.11, or load a module that has it"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { say "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=python3.11"; exit 1; }
if [[ -e $folder && ! -f $folder/pyvenv.cfg && ! -f $mine && -n $(ls -A "$folder") ]]; then
    say "$folder is there and is no virtual environment; name another folder"
    exit 1
fi

if [[ ! -x $folder/bin/python || -f $mine ]]; then
    mkdir -p "$folder"
    if [[ -f $mine ]]; then
        say "an earlier run did not end; $folder is made anew"
        find "$folder" -mindepth 1 -maxdepth 1 ! -name "${mine##*/}" -exec rm -rf {} +
    fi
    touch "$mine"
    "$python" -m venv "$folder"
fi

unset PYTHONPATH # what a module put there would count as installed
pip_install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

say "installing into $folder; the first time that takes minutes"
if [[ -n ${TORCH_INDEX:-} ]]; then
    pip_install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
fi
package=.${EXTRAS:+[$EXTRAS]}
if [[ ${EDITABLE:-yes} == no ]]; then
    pip_install -c constraints.txt "$package"
else
    pip_install -c constraints.txt -e "$package"
fi

cd "$folder" # not in the repository, where its folders would be imported, installed or not
bin/cldf --help >/dev/null
bin/python -c '
import cldf_dist.cli.pipeline, cldf_kernels, sys, torch
print(f"cldf_dist and torch {torch.__version__} work in {sys.prefix}, {torch.cuda.device_count()} GPU(s) here")'
rm -f "$mine"
