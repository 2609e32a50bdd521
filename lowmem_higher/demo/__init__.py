"""The main job: learn which training labels are wrong, with the exact meta-gradient of a whole training run.

    python -m lowmem_higher demo

One concept per file, in the order in which they build on each other:

    options.py        what the command line can ask for, and what it refuses
    progress.py       the progress bars
    data.py           handwritten digits, split; 40 % of the training labels made wrong
    metalearning.py   the inner loop, its meta-gradient, and the outer steps that use it: read this one first
    detection.py      what the learned weights tell about the labels
    accuracy.py       ordinary training, and the nets that the result is held against
    comparison.py     checkpointed against fully unrolled: memory, time, gradient
    picture.py        the figure
    summary.py        the table on the screen, and the JSON
    job.py            runs them all

Nothing is imported here: the job needs the extras of `pip install "lowmem_higher[demo]"`, the package does not.
"""
