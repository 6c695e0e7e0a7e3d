"""The published command that starts sixteen processes of gpt2_ft.py."""

import shlex

# The first of the four commands of the README; the shape of the model is the one word that a small test replaces.
COMMAND = """
python -m torch.distributed.launch --nproc_per_node=16 src/gpt2_ft.py
    --train_data ./data/e2e/train.jsonl --valid_data ./data/e2e/valid.jsonl
    --train_batch_size 8 --grad_acc 1 --noise_multiplier 0.6 --max_grad_norm 1.0
    --valid_batch_size 4 --seq_len 512 --model_card gpt2.md
    --init_checkpoint ./pretrained_checkpoints/gpt2-medium-pytorch_model.bin
    --platform local --clip 0.0 --lr 0.0004 --weight_decay 0.01 --correct_bias --adam_beta2 0.999
    --scheduler constant --warmup_step 0 --max_epoch 20 --save_interval 1000
    --lora_dim 4 --lora_alpha 32 --lora_dropout 0.0 --label_smooth 0.1
    --work_dir ./trained_models/GPT2_M/e2e --random_seed 110
"""


def words() -> list[str]:
    """The command's words after `python`."""
    return shlex.split(COMMAND)[1:]
