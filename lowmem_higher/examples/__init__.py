"""Two short programs of meta-learning, of the kinds for which `higher` was written.

    python -m lowmem_higher.examples.few_shot    learns initial weights that adapt to new classes in 5 steps
    python -m lowmem_higher.examples.energy      learns an energy whose descent completes images; no functional model

Both run on scikit-learn's digits, on the CPU, in well under a minute: pip install 'lowmem_higher[demo]'.
"""
