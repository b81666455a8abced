"""What a model is asked once training is over: tasks, questions, speed; of student and teacher."""
