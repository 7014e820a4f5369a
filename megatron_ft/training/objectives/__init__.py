"""What a step minimises. The step, the loop and the schedule are the same for every objective."""
