"""Starting the processes of a run: torchrun, ``accelerate launch`` and DeepSpeed's launcher with one behaviour."""
