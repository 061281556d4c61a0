"""Which start is best: what the shared expert is built from, compared by what training makes of it.

Every combination of selection, merge and start that makes sense is trained for a short while on a domain, beside full
fine-tuning, LoRA and a router that learns alone, all on the same text in the same order with the same losses.
`python -m benchmarks.starts` runs what is missing of the plan and writes the table and its pictures.
"""
