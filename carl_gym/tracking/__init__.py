"""What a run leaves behind: metrics and artifacts in MLflow, a drawn rollout tree, learning curves.

The last station of the flow: it reads trees and metrics and changes neither. MLflow and matplotlib are imported
only when something is logged or drawn.
"""
