"""Short programs of meta-learning, of the kinds for which `higher` was written, each a whole loop on real images.

    python -m lowmem_higher.examples.few_shot            initial weights that adapt to new tasks in 5 steps
    python -m lowmem_higher.examples.energy              an energy whose descent completes images; no functional model
    python -m lowmem_higher.examples.reweight            a weight for each example, where 40 % of the labels are wrong
    python -m lowmem_higher.examples.rates               a schedule of learning rate and weight decay over 1,000 steps
    python -m lowmem_higher.examples.distill             ten images from which a net learns, through the full window
    python -m lowmem_higher.examples.learned_optimizer   a small net as the update rule
    python -m lowmem_higher.examples.learned_loss        a loss that bears wrong labels, for classes not seen before

They run on scikit-learn's digits, on the CPU, in a minute or two: pip install 'lowmem_higher[demo]'. What each found
stands at its head. They run on `higher` as well, if `import lowmem_higher as higher` is changed to `import higher`,
with `--checkpoint-every 0`; `python -m lowmem_higher.examples.compare rates --updates 1` runs one on both.

For several processes:

    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.tasks_over_ranks    each takes some tasks
    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.data_parallel       each takes a part of a batch
    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.sharded             each holds a part of a model
"""
