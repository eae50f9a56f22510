"""What train_imagenet.py is made of. A file imports only from those above it in this list.

- messages.py: the error class, and printing.
- ranks.py: the processes of a run, and the signals that end it.
- run_folder.py: the folder that one run owns, and files that survive a crash.
- checkpoints.py: reading a checkpoint and finding what is wrong with it.
- data.py: images and batches.
- memory_plan.py: the network, and the memory and seconds that a step takes.
- command_line.py: the flags.
- steps.py: the SGD step and the Newton step.
- progress.py: where a run is, and what it has measured: metrics.csv, curves.png.
- training.py: the loop over epochs and batches, and the validation.
- resuming.py: going on from a checkpoint.
- run_setup.py: everything before the first step.
- main.py: from the command line to the exit code.
"""
