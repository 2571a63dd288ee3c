"""What tests and tools share. Tools may import it; it imports no tool."""
