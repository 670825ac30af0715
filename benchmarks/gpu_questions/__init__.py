"""Questions about a GPU and its driver, each answered yes or no with the evidence.

``python -m benchmarks.gpu_questions --out DIR`` asks all of them. Each is asked in a process of its
own, for some end in an illegal address, after which a process can use the GPU no more; what one had
found out by then is kept. Writes one gpu_questions-<date>-<commit>.json.
"""
