#!/usr/bin/env bash
# Makes MuJoCo render without a display: tries it, and where it fails installs Mesa's EGL or names the command that would.
#
#   scripts/rendering_libraries.sh [PYTHON]     PYTHON has mujoco installed; MUJOCO_GL chooses another back end
set -euo pipefail

python=${1:-python3}
export MUJOCO_GL=${MUJOCO_GL:-egl}
case $MUJOCO_GL in
    egl) packages=(libegl1 libegl-mesa0 libgl1-mesa-dri) ;;
    osmesa) packages=(libosmesa6) ;;
    *) packages=() ;;
esac

renders() {
    "$python" -c 'import mujoco; context = mujoco.GLContext(32, 32); context.make_current(); context.free()' 2>/dev/null
}

if renders; then
    exit 0
fi
if [[ ${#packages[@]} -eq 0 ]]; then
    echo "MUJOCO_GL=$MUJOCO_GL does not render here. Unset it to use egl, then run make setup." >&2
    exit 1
fi

as_root=()
if [[ $EUID -ne 0 ]]; then
    as_root=(sudo)
fi
install=("${as_root[@]}" apt-get install --yes --no-install-recommends "${packages[@]}")
if command -v apt-get >/dev/null && { [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; }; then
    echo "Installing the rendering libraries: ${install[*]}"
    "${as_root[@]}" apt-get update --quiet
    "${install[@]}"
    if renders; then
        exit 0
    fi
    echo "MUJOCO_GL=$MUJOCO_GL still does not render, although ${packages[*]} are installed. Try: MUJOCO_GL=osmesa make setup" >&2
    exit 1
fi
echo "Rendering needs system libraries that may not be installed from here. Run: ${install[*]}; then run make setup again." >&2
exit 1
