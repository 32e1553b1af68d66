"""What the CPU faces share: calls that copy nothing, compiled code, and the kernel over rows of codewords."""
