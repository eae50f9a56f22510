"""Train a deep fully connected network on ImageNet, by SGD or with exact damped Gauss–Newton steps.

    python3 train_imagenet.py --data-dir DIR --batch-size 256 --epochs 90 --lr 0.1 --hidden-dim 512 --num-layers 20
    python3 train_imagenet.py --data-dir DIR --batch-size 64 --epochs 90 --lr 0.01 --hidden-dim 256 --num-layers 20 \\
                              --use-hessian --hessian-freq 1 --device cuda
    torchrun --nproc-per-node=4 train_imagenet.py …      # several processes share out the batch of one
    python3 train_imagenet.py … --resume                 # go on, however the run ended; bit for bit on a CPU
    python3 train_imagenet.py … --evaluate               # the scores of the best checkpoint
    python3 train_imagenet.py --estimate                 # what a Hessian step costs on this machine, and what fits
    python3 train_imagenet.py --dummy …                  # generated images

The images are DIR/train/n01440764/*.JPEG and DIR/val/n01440764/*.JPEG, of any number of classes. Without --use-hessian
all steps are SGD with momentum. With it, every --hessian-freq-th batch takes a `DampedNewton` step (newton.py), which
finds its own length. Each epoch prints one line. --checkpoint-dir gets the checkpoints, config.json, metrics.csv and
curves.png. SIGTERM and Ctrl-C end the run after the present step, with a checkpoint. The parts are in imagenet/.
"""

from __future__ import annotations

import sys

from imagenet.main import main as run_command


def main(argv: list[str] | None = None) -> int:
    return run_command(argv, __doc__)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
