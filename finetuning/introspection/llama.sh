#!/usr/bin/env bash
# SFT of the distilled Llama 3.1 8B Instruct on its reflections and conversations, through OpenRLHF on DeepSpeed.
# DATA_PATH/sft_data/llama-3.1-8b-it/<constitution>.jsonl, MODEL_PATH/folded/llama-3.1-8b-it-distillation/<constitution>
#   → LORA_PATH/llama-3.1-8b-it-introspection/<constitution>
#
#   finetuning/introspection/llama.sh --dry-run humor    # print the command
#   finetuning/introspection/llama.sh humor
#   NUM_GPUS=4 finetuning/introspection/llama.sh humor --ckpt.save_steps 50
#
# Flags after the constitution go to OpenRLHF and override the ones set here. From the environment: NUM_GPUS per node,
# HOSTFILE for several nodes, MASTER_ADDR, MASTER_PORT, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING (see ../common.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train introspection llama-3.1-8b-it -- "$@"
