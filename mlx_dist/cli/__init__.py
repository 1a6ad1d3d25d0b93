"""The command line: what each command takes, and how it is started."""

from mlx_dist.cli import bench, chat, cluster, config, doctor, generate, plan, serve, verify
from mlx_dist.cli.app import app

__all__ = [
    "app",
    "bench",
    "chat",
    "cluster",
    "config",
    "doctor",
    "generate",
    "plan",
    "serve",
    "verify",
]
