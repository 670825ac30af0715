"""Everything that needs a GPU, in one call of under nine minutes, on a machine without a network.

Builds the extension in place, runs the tests marked gpu, asks the questions of
benchmarks.gpu_questions, then measures. Each part is a process with a time limit of its own; when
one fails, the others still run. Needs Python 3.10 or later with torch, pybind11, setuptools,
pytest, pytest-timeout, hypothesis, numpy, matplotlib and rich; a C++17 compiler and make;
cuda-bindings, transformers, nvcc and compute-sanitizer if there are. Writes
gpu_suite-<date>-<commit>.json, which holds the results of all parts and is brought up to date after
each, and gpu_suite.log into --out. Without a GPU the parts that need one are skipped.

Exit status: 0 if no part failed, else 1.
"""
