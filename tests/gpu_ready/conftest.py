"""The checks in `inside` load a stand-in for CUDA before torch: they have their own process."""

collect_ignore = ["inside"]
