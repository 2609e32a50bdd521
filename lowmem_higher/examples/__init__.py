"""Short programs of meta-learning: two of the kinds for which `higher` was written, three for several processes.

    python -m lowmem_higher.examples.few_shot    learns initial weights that adapt to new classes in 5 steps
    python -m lowmem_higher.examples.energy      learns an energy whose descent completes images; no functional model

Both run on scikit-learn's digits, on the CPU, in well under a minute: pip install 'lowmem_higher[demo]'.

    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.tasks_over_ranks    each takes some tasks
    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.data_parallel       each takes a part of a batch
    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.sharded             each holds a part of a model
"""
