"""What is learned after training: from answers, and from what came of them."""
