#!/usr/bin/env bash
# DPO of Gemma 3 4B it on one persona's pairs, through OpenRLHF on DeepSpeed.
# DATA_PATH/dpo/gemma-3-4b-it/<constitution>.jsonl → LORA_PATH/gemma-3-4b-it-distillation/<constitution>
#
#   finetuning/distillation/gemma.sh --dry-run humor    # print the command
#   finetuning/distillation/gemma.sh humor
#   NUM_GPUS=4 finetuning/distillation/gemma.sh humor --ckpt.save_steps 50
#
# Flags after the constitution go to OpenRLHF and override the ones set here. From the environment: NUM_GPUS per node,
# HOSTFILE for several nodes, MASTER_ADDR, MASTER_PORT, ATTN_IMPLEMENTATION, GRADIENT_CHECKPOINTING (see ../common.sh).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# OpenRLHF takes names, no pattern: the linear layers of the 34 language-model layers, none of the vision tower.
train distillation gemma-3-4b-it \
    --ds.lora.target_modules model.language_model.layers.{0..33}.{self_attn.{q,k,v,o},mlp.{gate,up,down}}_proj \
    -- "$@"
