#!/usr/bin/env bash
# SFT of the distilled Qwen 2.5 7B Instruct on its reflections and conversations, through OpenRLHF on DeepSpeed.
# DATA_PATH/sft_data/qwen-2.5-7b-it/<constitution>.jsonl, MODEL_PATH/folded/qwen-2.5-7b-it-distillation/<constitution>
#   → LORA_PATH/qwen-2.5-7b-it-introspection/<constitution>
#
#   finetuning/introspection/qwen.sh --dry-run humor    # print the command
#   finetuning/introspection/qwen.sh humor
#   NUM_GPUS=4 finetuning/introspection/qwen.sh humor --ckpt.save_steps 50
#
# Flags after the constitution go to OpenRLHF and override the ones set here. From the environment: NUM_GPUS per node,
# HOSTFILE for several nodes, MASTER_ADDR, MASTER_PORT, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING (see ../common.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train introspection qwen-2.5-7b-it -- "$@"
