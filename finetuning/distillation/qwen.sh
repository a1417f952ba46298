#!/usr/bin/env bash
# DPO of Qwen 2.5 7B Instruct on one persona's pairs, through OpenRLHF on DeepSpeed.
# DATA_PATH/dpo/qwen-2.5-7b-it/<constitution>.jsonl → LORA_PATH/qwen-2.5-7b-it-distillation/<constitution>
#
#   finetuning/distillation/qwen.sh --dry-run humor    # print the command
#   finetuning/distillation/qwen.sh humor
#   NUM_GPUS=4 finetuning/distillation/qwen.sh humor --ckpt.save_steps 50
#
# Flags after the constitution go to OpenRLHF and override the ones set here. From the environment: NUM_GPUS per node,
# HOSTFILE for several nodes, MASTER_ADDR, MASTER_PORT, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING (see ../common.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train distillation qwen-2.5-7b-it -- "$@"
