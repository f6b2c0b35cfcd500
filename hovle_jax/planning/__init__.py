"""What a compiled program will cost on a pod, without one: its collectives, its FLOPs, the chips' published peaks."""
