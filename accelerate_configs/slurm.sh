#!/bin/bash
# A recipe on all GPUs of several machines, under SLURM:
#
#   sbatch --nodes=2 --gpus-per-node=8 accelerate_configs/slurm.sh recipes/summarization/sft.py --config FILE.yaml key=value
#
# One task a machine; each starts its half with `accelerate launch`, which starts a process for each of its GPUs. The run's
# folder (output_dir) must lie on a file system that all machines share. A job that ends early goes on from its last
# checkpoint when the same command is given again; --requeue lets SLURM give it after preemption or a node's failure.
#
# Settings, from the environment: CONFIG_FILE (default accelerate_configs/multi_node.yaml), PROCESSES_PER_NODE (default: the
# GPUs SLURM gave, else 1), MAIN_ADDRESS (default: the first host), PORT (default: from the job's number), PYTHON (default:
# python).
#
#SBATCH --job-name=genalign
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "recipe=: a script is needed; give sbatch … slurm.sh recipes/F/S.py key=value"
[ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID=: this is no SLURM job; start it with sbatch or inside salloc"
[ -f "$1" ] || fail "recipe=$1: no such file; give the path of a recipe's script, seen from the folder of the job"

# SLURM runs a copy of this script, far from its neighbours, in the folder that sbatch was given in.
CONFIG_FILE=${CONFIG_FILE:-accelerate_configs/multi_node.yaml}
[ -f "$CONFIG_FILE" ] || fail "CONFIG_FILE=$CONFIG_FILE: no such file; start in the checkout, or name one of accelerate's files"

nodes=${SLURM_JOB_NUM_NODES:?"not set by SLURM"}
main=${MAIN_ADDRESS:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?"not set by SLURM"}" | head -n 1)}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
port=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# shellcheck disable=SC2016 # SLURM_NODEID is each task's own: it is read there, not here.
exec srun --kill-on-bad-exit=1 --wait=60 bash -c '
    exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"
' "${PYTHON:-python}" \
    --config_file "$CONFIG_FILE" \
    --num_machines "$nodes" \
    --num_processes $((nodes * per_node)) \
    --main_process_ip "$main" \
    --main_process_port "$port" \
    "$@"
