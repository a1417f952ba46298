#!/usr/bin/env bash
# DPO of Llama 3.1 8B Instruct on one persona's pairs, through OpenRLHF on DeepSpeed.
# DATA_PATH/dpo/llama-3.1-8b-it/<constitution>.jsonl → LORA_PATH/llama-3.1-8b-it-distillation/<constitution>
#
#   finetuning/distillation/llama.sh --dry-run humor    # print the command
#   finetuning/distillation/llama.sh humor
#   NUM_GPUS=4 finetuning/distillation/llama.sh humor --ckpt.save_steps 50
#
# Flags after the constitution go to OpenRLHF and override the ones set here. From the environment: NUM_GPUS per node,
# HOSTFILE for several nodes, MASTER_ADDR, MASTER_PORT, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING (see ../common.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train distillation llama-3.1-8b-it -- "$@"
