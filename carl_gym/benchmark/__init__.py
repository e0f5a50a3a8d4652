"""Algorithms side by side: the same start, questions and budget, a training run per cell of a grid.

arms x rates x seeds --plan--> cells                                     arms.py, plan.py
cells --a process each--> run folders --> a line each in cells.jsonl      runner.py, cell_process.py, records.py
records --aggregate--> numbers --> tables and figures                      results.py, report.py, rise.py, figures.py
"""
