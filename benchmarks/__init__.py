"""What is measured; results/ is written by these programs alone."""
