"""Train a search agent with CARL or a baseline: `python scripts/train_carl.py --help`."""

from carl_gym.training.cli import main

if __name__ == "__main__":
    main()
