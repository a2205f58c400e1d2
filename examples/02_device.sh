#!/usr/bin/env bash
# A new device, from nothing to a verified bundle, verb by verb. On a simulated device: a minute or two.
#
#   examples/02_device.sh                         a simulated device
#   examples/02_device.sh my-cpu onnxruntime 3    this CPU, 3 minutes of profiling, on a quiet machine
#
# A board over SSH takes `--host user@board` at `device add`, and all that follows stays as it is.
# Everything lies in runs/02_device, which may be removed afterwards; a second start goes on where the first one was.
set -euo pipefail
name=${1:-example} runtime=${2:-simulated} minutes=${3:-0.2}
model=(hwsearch.models.resnet:resnet_small --input 1x1x28x28)
bundle=runs/02_device/bundle
export HWSEARCH_HOME=$PWD/runs/02_device

# What it is: devices/NAME.toml in the home above.
[ -e "$HWSEARCH_HOME/devices/$name.toml" ] || hwsearch device add "$name" --runtime "$runtime" --threads 1
hwsearch device check "$name" # reference speed, noise floor, a verdict; exit status 1: too noisy to be measured

# How long things take there: random networks, and the widths of the model that you care about.
hwsearch profile --device "$name" --minutes "$minutes" --model "${model[@]}"
hwsearch fit --device "$name" # the predictor and its error card

# Predicted and measured: the two should agree within what the card says.
hwsearch estimate "${model[@]}" --device "$name"
hwsearch measure "${model[@]}" --device "$name"

# A bundle with a promise of 100 ms, and whether the device keeps it.
hwsearch deploy "${model[@]}" --device "$name" --output "$bundle" --budget-ms 100
hwsearch verify "$bundle" --device "$name"
hwsearch report "$bundle" --output "$HWSEARCH_HOME/report.html"
