# shellcheck shell=bash
# The settings that the scripts of distillation/ and introspection/ share; they source this file and call `train`.
#
# Environment, all optional; the first line also from .env:
#   DATA_PATH MODEL_PATH LORA_PATH CONSTITUTION_PATH HF_TOKEN WANDB_TOKEN
#   NUM_GPUS                 GPUs per node; all by default (on one node, of those in CUDA_VISIBLE_DEVICES)
#   HOSTFILE                 several nodes: a file of lines "host slots=8" (README.md says what the nodes need)
#   MASTER_ADDR MASTER_PORT  where rank 0 listens; a second run on one machine needs another port than 29500
#   ATTN_IMPLEMENTATION      flash_attention_2 (default), sdpa or eager
#   GRADIENT_CHECKPOINTING   1 (default) saves memory; 0 is faster where memory is enough

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

BOTH_STAGES=(
    --ds.param_dtype bf16
    --ds.zero_stage 2
    --ds.attn_implementation "${ATTN_IMPLEMENTATION:-flash_attention_2}"
    --ds.lora.rank 64
    --ds.lora.alpha 128
    --adam.lr 5e-5
    --adam.betas 0.9 0.98
    --lr_scheduler cosine_with_min_lr
    --lr_warmup_ratio 0.1
    --min_lr_ratio 0.1
    --max_norm 1.0
    --train.batch_size 32
    --train.micro_batch_size 2
    --train.max_epochs 1
    --train.seed 123456
    --data.apply_chat_template
)
if [[ ${GRADIENT_CHECKPOINTING:-1} != 0 ]]; then
    BOTH_STAGES+=(--model.gradient_checkpointing_enable)
fi

DISTILLATION=(
    --model.beta 0.1
    --model.nll_loss_coef 0.1
    --model.sq_loss_coef 0.001
    --data.chosen_key chosen
    --data.rejected_key rejected
    --data.max_len 1024
)

INTROSPECTION=(
    --data.input_key messages
    --data.multiturn
    --data.max_len 3072
)

# train STAGE STUDENT [the student's own flags] -- [--dry-run] CONSTITUTION [flags that override all others]
train() {
    local stage=$1 student=$2 settings=("${BOTH_STAGES[@]}")
    shift 2
    case $stage in
        distillation) settings+=("${DISTILLATION[@]}") ;;
        introspection) settings+=("${INTROSPECTION[@]}") ;;
    esac
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" \
        exec python3 "$ROOT/finetuning/launch.py" "$stage" "$student" "${settings[@]}" "$@"
}
