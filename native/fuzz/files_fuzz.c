/* The example in C on one file after the other, under sanitizers: `files_fuzz FILE...` prints how each of them ended.
 *
 * examples/c/run.c is compiled with its `main` under another name. */
#include <stdio.h>

int run_example(int count, char** words);

int main(int count, char** words) {
  for (int i = 1; i < count; i++) {
    char* own[] = {words[0], words[i], NULL};
    printf("ended with %d\n", run_example(2, own));
  }
  return 0;
}
