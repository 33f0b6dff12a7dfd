"""Every method that puts something into the forward pass, one small file each or close family."""
